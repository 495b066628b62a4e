"""Chats: from messages to the chunks of an answer, and /v1/chat/completions over them."""
