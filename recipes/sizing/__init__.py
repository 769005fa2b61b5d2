"""Whether something fits: the machine, a training, and a model that reinforcement learning is to start from."""
