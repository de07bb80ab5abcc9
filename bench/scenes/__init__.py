"""The training world: scenes with captions, a program that scores pictures of them, and the training run."""
