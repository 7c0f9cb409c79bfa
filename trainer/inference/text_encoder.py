"""An encoder bundle, ready to use: raw text in, states out."""

from pathlib import Path

import tensorflow as tf

from data_pipelines.files import is_remote
from data_pipelines.tokenizers.tokenizer import Tokenizer
from trainer.inference.hub import fetched_bundle
from trainer.inference.text_classifier import bundle_tokenizer
from trainer.models import bundle
from trainer.models.encoder import Encoder, States


class TextEncoder(tf.Module):
    """An encoder with its tokenizer, all in-graph.

    Attributes:
        encoder: It starts from its learned state.
        tokenizer: The one that it was trained with.
    """

    def __init__(self, encoder: Encoder, tokenizer: Tokenizer):
        super().__init__(name="text_encoder")
        self.encoder = encoder
        self.tokenizer = tokenizer

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string)], autograph=False)
    def of_texts(self, texts: tf.Tensor) -> tuple[tf.RaggedTensor, States]:
        """Returns outputs of the top layer, ragged [texts, (tokens), units], and final states.

        The states are [h, c] for each layer, each [texts, units]. The last token of a text is its
        end token.
        """
        ids = self.tokenizer.encode(texts)
        lengths = tf.cast(ids.row_lengths(), tf.int32)
        outputs, final = self.encoder(ids.to_tensor(), lengths)
        return tf.RaggedTensor.from_tensor(outputs, lengths), final

    def __call__(self, texts: tf.Tensor, training: bool = False) -> States:
        """Returns the final states only, as a Keras encoder does.

        Args:
            texts: string [texts].
            training: Must be False.
        """
        if training:
            raise ValueError("a TextEncoder only reads; to train its encoder, use --stage=finetune")
        return self.of_texts(texts)[1]


def load_encoder(folder: str | Path) -> TextEncoder:
    """Returns the encoder of a bundle from pretraining, with its learned state.

    The bundle may be at an address.

    Raises:
        InputError: There is no encoder bundle in `folder`, or it is damaged.
    """
    folder = fetched_bundle(str(folder), "encoder") if is_remote(str(folder)) else Path(folder)
    loaded = bundle.load(folder, "encoder", "folder")
    return TextEncoder(bundle.encoder_of(loaded), bundle_tokenizer(folder, loaded.info, "folder"))
