"""Asking a trained model: transformers or llama.cpp, one question, a conversation, a server."""
