"""What weights lie in: safetensors, torch's files, ZeRO checkpoints, adapters; and opening any of them."""
