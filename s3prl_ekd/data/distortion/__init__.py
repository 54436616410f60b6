"""Distortions of the waveforms: noise on them, and a room, another pitch or a gap in the band."""
