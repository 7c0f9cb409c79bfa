from trainer.config import Config
from trainer.stages.label_curve import part_config

CONFIG = Config(seed=5, finetune_batch_size=8, adversarial_weight=1.0, pooling="concat")


def test_with_few_labels_the_warm_start_is_a_linear_head_on_the_frozen_encoder() -> None:
    config = part_config(CONFIG, "warm", 20, 2)
    assert (config.finetune_steps, config.hidden_units, config.pooling) == (0, 0, "mean")
    assert (config.finetune_documents, config.seed) == (20, 7)


def test_from_scratch_everything_is_trained_for_twenty_passes() -> None:
    config = part_config(CONFIG, "scratch", 20, 0)
    assert (config.hidden_units, config.pooling) == (0, "mean")
    assert config.finetune_steps == 50  # 400 documents, 8 a step
    assert config.adversarial_weight == 0


def test_with_more_labels_everything_is_trained_as_with_all() -> None:
    config = part_config(CONFIG, "warm", 600, 0)
    assert (config.hidden_units, config.pooling) == (CONFIG.hidden_units, "concat")
    assert config.finetune_steps == CONFIG.finetune_steps  # 12,000 documents would be 1,500 steps
    assert config.adversarial_weight == 1
