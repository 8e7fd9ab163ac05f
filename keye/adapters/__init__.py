"""The encoder for other models: Qwen-VL processors of transformers, and a replacement for keye-vl-utils."""
