"""Read and write files safely: nothing executed, nothing half-written, errors in one sentence."""
