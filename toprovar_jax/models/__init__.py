"""The models: transformer, bitwise tokenizer, text encoder."""
