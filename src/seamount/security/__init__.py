"""Who may do what, and the proof: API keys, who a caller is, what each key used, certificates."""
