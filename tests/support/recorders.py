"""What records decode steps where there is no GPU."""


class CallingRecorder:
    """What a CUDA graph does, done by calling: reads the same inputs and overwrites the same output each time."""

    def __init__(self):
        self.sizes = []
        self.replayed = []

    def __call__(self, function):
        output = function()
        size = output.shape[0]
        self.sizes.append(size)

        def replay():
            self.replayed.append(size)
            output.copy_(function())

        return replay, output
