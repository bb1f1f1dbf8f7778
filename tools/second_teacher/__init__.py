"""The second teacher, for benchmarks: posters with words in real fonts, for a SigLIP tower and a Qwen2 decoder."""
