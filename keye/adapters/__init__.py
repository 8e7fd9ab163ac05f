"""The encoder in other people's models: Qwen-VL processors of transformers, and keye-vl-utils by one import."""
