"""The formats of this package, held to the suite."""

from __future__ import annotations

from tests.conformance.format_suite import FormatConformance


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
