"""Which requests the engine works on now, in what order the others wait, and what each key may use."""
