"""Read and write the files and cards in folders and repositories; push in one commit."""
