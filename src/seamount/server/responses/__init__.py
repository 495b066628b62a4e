"""OpenAI's Responses API over chats: translated, streamed, kept."""
