"""Read and write what lies in a folder or a repository: files, cards, one commit."""
