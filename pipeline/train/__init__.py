"""ZeRO fine-tuning: full-parameter and LoRA, on a raw DeepSpeed engine whose masters start from theta' in
float32.
"""
