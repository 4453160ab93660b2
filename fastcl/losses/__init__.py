"""One file per objective: its function, its module, its formula and its paper."""
