"""HuBERT, WavLM and wav2vec 2.0 encoders with fewer and larger matrix products."""
