import pytest

from data_pipelines.errors import InputError, raise_if


def test_raise_if() -> None:
    raise_if([])
    with pytest.raises(InputError, match="^a\nb$"):
        raise_if(["a", "b"])
