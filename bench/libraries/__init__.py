"""EKFAC end to end, one library a file: `run(setting, folder, repeats)` in a process of its own.

Each returns {"seconds": {step: [one number a repeat]}, "memory": bytes} and leaves its scores (Q,N) and what the
checks need in `folder`. Memory is the peak resident size in the first repeat above that of the process with everything
imported and the model and data made.
"""
