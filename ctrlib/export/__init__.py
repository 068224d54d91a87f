"""Models as programs for other processes, languages and runtimes: `ctrlib export`."""
