"""The package without its extras: what works all the same, and what a missing one is called."""

import subprocess
import sys

import pytest

WITHOUT = """
import sys

class Missing:
    names = {packages!r}

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.names:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing())
{code}
"""
EXTRAS = {
    "notebooks": {"jupyterlab", "ipywidgets", "matplotlib", "PIL", "nbval", "papermill", "nbformat", "IPython"},
    "data": {"pyarrow", "datasets"},
    "scale": {"ray"},
}


def run_without(packages: set[str], code: str) -> subprocess.CompletedProcess:
    """Run some Python as if these packages were not installed."""
    program = WITHOUT.format(packages=packages, code=code)
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)


@pytest.mark.slow
def test_the_library_needs_no_extra(tmp_path):
    code = f"""
import torch
from retro_nb import RETRO, TrainingWrapper, evaluate_loss
from retro_nb.__main__ import main
for name in ("a", "b"):
    open(r"{tmp_path}/" + name + ".txt", "w").write("Bees dance. " * 60)
retro = RETRO(enc_dim=16, enc_depth=1, dec_dim=16, dec_depth=1, dec_cross_attn_layers=(1,), max_seq_len=64)
wrapper = TrainingWrapper(
    retro=retro, knn=1, chunk_size=64, documents_path=r"{tmp_path}", work_dir=r"{tmp_path}/work", progress=False
)
assert evaluate_loss(retro, wrapper.ds) > 0
"""
    done = run_without(set().union(*EXTRAS.values()), code)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize(
    ("extra", "code"),
    [
        ("notebooks", "import retro_nb.plotting"),
        ("notebooks", "import retro_nb.lab.runner"),
        ("notebooks", "import retro_nb.lab.refresh"),
        ("data", "from retro_nb import parquet; open('x.parquet', 'w').close(); parquet('x.parquet')"),
        ("data", "from retro_nb import hf_dataset; next(iter(hf_dataset('user/name')))"),
        ("scale", "from retro_nb.store.cluster import cluster\nwith cluster(1): pass"),
    ],
)
def test_a_missing_extra_is_named(extra, code, tmp_path):
    done = run_without(EXTRAS[extra], f"import os; os.chdir(r'{tmp_path}')\n{code}")
    assert done.returncode == 1
    assert f"retro-nb[{extra}]" in done.stderr.strip().splitlines()[-1]
