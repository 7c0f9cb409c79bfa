"""The factor on the loss with which gradients in float16 neither vanish nor overflow.

Micikevicius et al. 2018, section 3.2, with the rule of its section 3.3: halved where a gradient is
not finite, doubled after a long run of steps that are. All workers agree on it without asking:
they see the same sums. It starts at 1, for the gradients here are those of a sum over a batch.
"""

import keras
import tensorflow as tf

SMALLEST, LARGEST = 2.0**-24, 2.0**24
STEPS_TO_DOUBLE = 1000


class LossScale:
    """The factor; call it in the distributor's scope.

    Attributes:
      variables: what a checkpoint must hold, by name.
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
        """Takes in a step that was finite."""
        steps = int(self._steps.numpy()) + 1
        if steps == STEPS_TO_DOUBLE:
            self._scale.assign(min(2 * float(self._scale.numpy()), LARGEST))
            steps = 0
        self._steps.assign(steps)

    def shrink(self) -> bool:
        """Takes in a step that was not; returns whether to try it again.

        It is not where even the smallest factor did not help. The fault is another then, and the
        factor begins anew: with the smallest the steps that follow would have no gradient.
        """
        scale = float(self._scale.numpy())
        gives_up = scale <= SMALLEST
        self._scale.assign(1.0 if gives_up else scale / 2)
        self._steps.assign(0)
        return not gives_up
