"""Makes the distributor that --distributor names."""

from data_pipelines.errors import raise_if
from trainer.distribution import horovod, tf_distribute
from trainer.distribution.cluster import Cluster, distributor_faults
from trainer.distribution.distributor import Distributor


def make_distributor(kind: str, cluster: Cluster, collective_timeout_seconds: float) -> Distributor:
    """Returns the distributor of `kind`, one of config.DISTRIBUTORS.

    "auto" is horovod or multi_worker if the environment names peers, else one_device.

    Raises:
        InputError: `kind` does not fit the environment.
    """
    raise_if(distributor_faults(kind, cluster))
    if kind == "auto":
        several = "horovod" if cluster.horovod else "multi_worker"
        kind = several if cluster.size > 1 else "one_device"
    if kind == "horovod":
        return horovod.horovod(cluster, collective_timeout_seconds)
    if kind == "multi_worker":
        return tf_distribute.multi_worker(cluster, collective_timeout_seconds)
    if kind == "mirrored":
        return tf_distribute.mirrored()
    return tf_distribute.one_device()
