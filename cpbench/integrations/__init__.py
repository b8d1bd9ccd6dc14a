"""cpbench inside other libraries: attention of Hugging Face models, and capture of q, k and v."""
