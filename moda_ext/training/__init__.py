"""Training a vision-language model with MODA."""
