"""The factor on the loss that keeps float16 gradients from vanishing and overflowing.

Micikevicius et al. 2018, sections 3.2 and 3.3: halved when a gradient is not finite, doubled after
many finite steps. All workers agree without communication, because they see the same sums. It
starts at 1, because gradients here are sums over a batch.
"""

import keras
import tensorflow as tf

SMALLEST, LARGEST = 2.0**-24, 2.0**24
STEPS_TO_DOUBLE = 1000


class LossScale:
    """The factor; make it in the distributor's scope.

    Attributes:
        variables: What a checkpoint must hold, by name.
    """

    def __init__(self) -> None:
        self._scale = keras.Variable(1.0, trainable=False, dtype="float32", name="loss_scale")
        self._steps = keras.Variable(0, trainable=False, dtype="int64", name="steps_since_change")
        self.variables = {
            "loss_scale/scale": self._scale,
            "loss_scale/steps_since_change": self._steps,
        }

    def factor(self) -> tf.Tensor:
        """Returns the factor, a scalar, inside a step or outside."""
        return tf.convert_to_tensor(self._scale)

    def grow(self) -> None:
        """Counts a finite step, and doubles the factor when it is time."""
        steps = int(self._steps.numpy()) + 1
        if steps == STEPS_TO_DOUBLE:
            self._scale.assign(min(2 * float(self._scale.numpy()), LARGEST))
            steps = 0
        self._steps.assign(steps)

    def shrink(self) -> bool:
        """Halves the factor after a step that was not finite; returns whether to try it again.

        If the smallest factor did not help, the cause is another one. The factor then returns to
        1, because the smallest would leave later steps without gradients.
        """
        scale = float(self._scale.numpy())
        gives_up = scale <= SMALLEST
        self._scale.assign(1.0 if gives_up else scale / 2)
        self._steps.assign(0)
        return not gives_up
