"""How weights change: data, training loop, evaluation. It must not know protocols or roll-outs."""
