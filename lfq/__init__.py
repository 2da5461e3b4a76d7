"""lfq: fast sampling of lattice phi^4, with HMC, trivializing flows and flow-HMC."""

from ._core import NotFiniteError
from ._kernels import info
from ._version import __version__
from .actions import Phi4, PulledBack
from .comparison import Comparison, Contender, DisagreementWarning, FailureWarning, compare
from .custom import CustomAction, evaluate_signature
from .flows import AffineFlow, Compose, Flow, InterleaveMap, MultiscaleFlow, UpsampleMap, load_flow
from .heat_bath import HeatBath
from .hmc import HMC, INTEGRATORS, ClusterHMC, FourierHMC, Integrator, Run, State
from .interchange import load_fields, save_fields
from .priors import Gaussian, Interleave, Lattice, Upsample
from .samplers import Annealing, IndependenceMetropolis, Reweighting, Weighted, reverse_ess
from .train import Fit, train, train_ladder

__all__ = [
    "HMC",
    "INTEGRATORS",
    "AffineFlow",
    "Annealing",
    "ClusterHMC",
    "Comparison",
    "Compose",
    "Contender",
    "CustomAction",
    "DisagreementWarning",
    "FailureWarning",
    "Fit",
    "Flow",
    "FourierHMC",
    "Gaussian",
    "HeatBath",
    "IndependenceMetropolis",
    "Integrator",
    "Interleave",
    "InterleaveMap",
    "Lattice",
    "MultiscaleFlow",
    "NotFiniteError",
    "Phi4",
    "PulledBack",
    "Reweighting",
    "Run",
    "State",
    "Upsample",
    "UpsampleMap",
    "Weighted",
    "__version__",
    "compare",
    "evaluate_signature",
    "info",
    "load_fields",
    "load_flow",
    "reverse_ess",
    "save_fields",
    "train",
    "train_ladder",
]
