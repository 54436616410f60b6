"""Waveform distortion: additive noise, reverberation, pitch shift and band rejection."""
