"""Number probing: Fourier spectra of number embeddings, and whether n mod T can be read off.

The parts are imported on first use, so that importing this package costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fulgurite.lazy import lazy_attributes

if TYPE_CHECKING:
    from fulgurite.models.number_probing.checks import check_embeddings
    from fulgurite.models.number_probing.classical import PPMI, SkipGram
    from fulgurite.models.number_probing.controls import (
        ceiling,
        collinear,
        gaussian,
        histogram,
        planted,
        row_shuffled,
    )
    from fulgurite.models.number_probing.counting import (
        cooccurrences,
        ppmi,
        save_vectors,
        svd_embeddings,
    )
    from fulgurite.models.number_probing.diagnosis import Diagnosis, PeriodDiagnosis, diagnose
    from fulgurite.models.number_probing.fisher import Scatter, principal_components, scatter
    from fulgurite.models.number_probing.fourier import (
        Spectrum,
        Spike,
        period_power,
        spectrum,
        spikes,
    )
    from fulgurite.models.number_probing.module import HeadOptions, NumberLM
    from fulgurite.models.number_probing.optimizer import (
        AdamWOptions,
        MuonAdamW,
        MuonOptions,
        parameter_groups,
    )
    from fulgurite.models.number_probing.probing import (
        ClassifierOptions,
        FoldOptions,
        ProbeResult,
        cohen_kappa,
        make_folds,
        probe,
    )
    from fulgurite.models.number_probing.tables import (
        NumberTable,
        number_tokens,
        parse_numbers,
        read_table,
    )

_MODULES = {
    "checks": ("check_embeddings",),
    "classical": ("PPMI", "SkipGram"),
    "counting": ("cooccurrences", "ppmi", "save_vectors", "svd_embeddings"),
    "module": ("HeadOptions", "NumberLM"),
    "optimizer": ("AdamWOptions", "MuonAdamW", "MuonOptions", "parameter_groups"),
    "controls": ("ceiling", "collinear", "gaussian", "histogram", "planted", "row_shuffled"),
    "diagnosis": ("Diagnosis", "PeriodDiagnosis", "diagnose"),
    "probing": (
        "ClassifierOptions",
        "FoldOptions",
        "ProbeResult",
        "cohen_kappa",
        "make_folds",
        "probe",
    ),
    "fisher": ("Scatter", "principal_components", "scatter"),
    "fourier": ("Spectrum", "Spike", "period_power", "spectrum", "spikes"),
    "tables": ("NumberTable", "number_tokens", "parse_numbers", "read_table"),
}

__all__ = [
    "PPMI",
    "AdamWOptions",
    "ClassifierOptions",
    "Diagnosis",
    "FoldOptions",
    "HeadOptions",
    "MuonAdamW",
    "MuonOptions",
    "NumberLM",
    "NumberTable",
    "PeriodDiagnosis",
    "ProbeResult",
    "Scatter",
    "SkipGram",
    "Spectrum",
    "Spike",
    "ceiling",
    "check_embeddings",
    "cohen_kappa",
    "collinear",
    "cooccurrences",
    "diagnose",
    "gaussian",
    "histogram",
    "make_folds",
    "number_tokens",
    "parameter_groups",
    "parse_numbers",
    "period_power",
    "planted",
    "ppmi",
    "principal_components",
    "probe",
    "read_table",
    "row_shuffled",
    "save_vectors",
    "scatter",
    "spectrum",
    "spikes",
    "svd_embeddings",
]

__getattr__, __dir__ = lazy_attributes(__name__, _MODULES)
