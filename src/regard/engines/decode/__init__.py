"""Engine `decode`: one or a few queries on CUDA, over keys in order or in pages, by Triton."""
