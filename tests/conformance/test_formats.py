"""The formats of this package, held to the suite."""

from __future__ import annotations

from pathlib import Path

import pytest

from diskwright.core.create import create_image
from diskwright.core.gate import DirectoryGate
from tests.conformance.format_suite import SIZE, FormatConformance


class TestRaw(FormatConformance):
    format_name = "raw"
    can_check = False


class TestQcow2(FormatConformance):
    format_name = "qcow2"
    has_backing = True


class TestQcow2SmallClusters(FormatConformance):
    format_name = "qcow2"
    create_options = {"cluster-size": 512}
    has_backing = True
    model_examples = 15


class TestQcow2LargeClusters(FormatConformance):
    format_name = "qcow2"
    create_options = {"cluster-size": 2 << 20}
    has_backing = True
    model_examples = 15


class TestQcow2Version2(FormatConformance):
    format_name = "qcow2"
    create_options = {"compat": "0.10"}
    has_backing = True
    model_examples = 15


class TestQcow2Extended(FormatConformance):
    format_name = "qcow2"
    create_options = {"extended-l2": True}
    has_backing = True
    model_examples = 15


class TestQcow2ExtendedPreallocated(FormatConformance):
    format_name = "qcow2"
    create_options = {"extended-l2": True, "cluster-size": 16384, "preallocation": "metadata"}
    has_backing = True
    model_examples = 15


class _WithDataFile(FormatConformance):
    """Images in two files; the second is named like the first, with ``.data`` behind it."""

    format_name = "qcow2"
    has_backing = True
    model_examples = 10

    def make(self, path: Path, size: int = SIZE, **options: object) -> Path:
        names = {key.replace("-", "_"): value for key, value in {**self.create_options, **options}.items()}
        create_image(
            str(path), "qcow2", {"size": size, "data_file": f"{path}.data", **names},
            gate=DirectoryGate(), check_backing=False,
        )  # fmt: skip
        return path


class TestQcow2DataFile(_WithDataFile):
    pass


class TestQcow2RawDataFile(_WithDataFile):
    create_options = {"data-file-raw": True}
    has_backing = False
    sparse = False


class TestQcow2ExtendedDataFile(_WithDataFile):
    create_options = {"extended-l2": True}


class TestQcow2Luks(FormatConformance):
    format_name = "qcow2"
    create_options = {"encrypt.format": "luks", "encrypt.key-secret": "sec0", "encrypt.iter-time": 1}
    open_options = {"encrypt.key-secret": "sec0"}
    secrets = {"sec0": b"a passphrase"}
    encrypted = True
    has_backing = True
    model_examples = 15


class TestQcow2LuksSmallClusters(TestQcow2Luks):
    create_options = {**TestQcow2Luks.create_options, "cluster-size": 512}
    model_examples = 5


class TestQcow2Aes(FormatConformance):
    format_name = "qcow2"
    create_options = {"encrypt.format": "aes", "encrypt.key-secret": "sec0"}
    open_options = {"encrypt.key-secret": "sec0"}
    secrets = {"sec0": b"a password"}
    encrypted = True
    has_backing = True
    model_examples = 15


class TestLuks(FormatConformance):
    format_name = "luks"
    create_options = {"key-secret": "sec0", "iter-time": 1}
    open_options = {"key-secret": "sec0"}
    secrets = {"sec0": b"a passphrase"}
    encrypted = True
    can_check = False
    can_grow = False  # it can, but new bytes read as noise
    sparse = False
    model_examples = 15

    def make(self, path: Path, size: int = SIZE, **options: object) -> Path:
        """A new LUKS volume reads as noise: it is given the zeros that the suite expects."""
        super().make(path, size, **options)
        disk = self.open(path)
        disk.pwrite(0, bytes(size))
        disk.close()
        return path


class TestLuksEssiv(TestLuks):
    create_options = {**TestLuks.create_options, "cipher-mode": "cbc", "ivgen-alg": "essiv", "cipher-alg": "aes-256"}
    model_examples = 5


class TestLuks2(TestLuks):
    create_options = {**TestLuks.create_options, "luks-version": "2", "pbkdf": "pbkdf2", "sector-size": 4096}
    can_check = True
    header_room = 16 << 20
    model_examples = 5
    test_sizes_that_fit_no_cluster = None  # disks are made of whole sectors of 4096 bytes


class TestDmg(FormatConformance):
    format_name = "dmg"
    can_grow = False
    sparse = False
    header_room = 16 << 20  # what is written again gets another place
    model_examples = 15
    test_a_new_image_is_recognised_and_reads_as_zeros = None  # it is by its name only, see tests/formats/dmg


class TestDmgPlain(TestDmg):
    create_options = {"subformat": "UDRO"}
    model_examples = 5


class TestVdi(FormatConformance):
    format_name = "vdi"
    can_check = False
    can_grow = False
    model_examples = 15


class TestVmdk(FormatConformance):
    format_name = "vmdk"
    model_examples = 15


class TestVmdkZeroedGrains(TestVmdk):
    create_options = {"zeroed-grain": True}


class _VmdkFiles(TestVmdk):
    """Disks of several files, of 300 KiB each where they are split."""

    model_examples = 10

    @pytest.fixture(autouse=True)
    def short_files(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("diskwright.formats.vmdk.create.SPLIT", 300 << 10)

    def make(self, path: Path, size: int = SIZE, **options: object) -> Path:
        names = {key.replace("-", "_"): value for key, value in {**self.create_options, **options}.items()}
        create_image(str(path), "vmdk", {"size": size, **names}, gate=DirectoryGate())
        return path


class TestVmdkFlat(_VmdkFiles):
    create_options = {"subformat": "monolithicFlat"}
    sparse = False


class TestVmdkSplitSparse(_VmdkFiles):
    can_grow = False
    create_options = {"subformat": "twoGbMaxExtentSparse"}


class TestVmdkSplitFlat(_VmdkFiles):
    can_grow = False
    create_options = {"subformat": "twoGbMaxExtentFlat"}
    sparse = False


class TestVdiStatic(TestVdi):
    create_options = {"static": True}
    sparse = False


class TestParallels(FormatConformance):
    format_name = "parallels"
    can_grow = False
    model_examples = 15


class TestParallelsOddClusters(TestParallels):
    create_options = {"cluster-size": 3584}


class TestQed(FormatConformance):
    format_name = "qed"
    has_backing = True


class TestQedSmallest(FormatConformance):
    format_name = "qed"
    create_options = {"cluster-size": 4096, "table-size": 1}
    has_backing = True
    model_examples = 15


class TestVhdx(FormatConformance):
    format_name = "vhdx"
    create_options = {"block-size": 1 << 20}
    model_examples = 15


class TestVhdxFixed(FormatConformance):
    format_name = "vhdx"
    create_options = {"block-size": 1 << 20, "subformat": "fixed"}
    can_grow = False
    sparse = False
    model_examples = 15


class TestVhdxDifferencing(FormatConformance):
    """Over a parent that has nothing in it."""

    format_name = "vhdx"
    create_options = {"block-size": 1 << 20}
    model_examples = 15

    def make(self, path: Path, size: int = SIZE, **options: object) -> Path:
        parent = path.with_name(f"{path.name}.parent")
        super().make(parent, size)
        names = {"size": size, **self.create_options, **options, "backing_file": parent.name, "backing_fmt": "vhdx"}
        create_image(str(path), "vhdx", names, gate=DirectoryGate())
        return path
