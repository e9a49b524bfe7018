"""Forms in which models are published besides Hugging Face directories: GGUF files, by name, other tokenizers."""
