"""Closed-form probes of frozen hidden states: phones, speakers and emotions, without training."""
