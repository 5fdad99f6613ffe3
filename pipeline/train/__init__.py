"""ZeRO fine-tuning, full or LoRA, on a raw DeepSpeed engine whose masters start from theta' in float32.

From what is asked to what is left: job, course, session (on zero_engine), loop, checkpoint, result.
"""
