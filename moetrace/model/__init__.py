"""Model files: what a GGUF file says, its tensors, its experts, and files with fewer of them."""
