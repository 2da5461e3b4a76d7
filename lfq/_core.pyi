import numpy as np
from numpy.typing import NDArray

Real = NDArray[np.float32] | NDArray[np.float64]
Doubles = NDArray[np.float64]
Records = NDArray[np.void]

class NotFiniteError(ValueError, ArithmeticError): ...

theory_dtype: np.dtype[np.void]
layer_dtype: np.dtype[np.void]
hmc_dtype: np.dtype[np.void]
cluster_dtype: np.dtype[np.void]
heat_bath_dtype: np.dtype[np.void]
N_OBSERVABLES: int
MAX_HIDDEN: int
MAX_CHANNELS: int
MAX_STAGES: int
PURPOSES: dict[str, int]
LAYERS: dict[str, int]
CLUSTERS: dict[str, int]

def version() -> str: ...
def abi_version() -> int: ...
def isa() -> str: ...
def isas() -> str: ...
def set_isa(name: str) -> None: ...
def max_threads() -> int: ...
def philox4x32(counter: NDArray[np.uint32], key: NDArray[np.uint32]) -> NDArray[np.uint32]: ...
def normal(
    seed: int, purpose: int, trajectory: int, first_chain: int, n_chains: int, out: Real, n_threads: int = 0
) -> None: ...
def uniform(
    seed: int, purpose: int, first_trajectory: int, first_chain: int, n_chains: int, out: Doubles
) -> None: ...
def phi4_action(theory: Records, phi: Real, action: Doubles, n_threads: int = 0) -> None: ...
def phi4_force(theory: Records, phi: Real, force: Real, n_threads: int = 0) -> None: ...
def phi4_observables(
    theory: Records, phi: Real, smear: Doubles, observables: Doubles, n_threads: int = 0
) -> None: ...
def flow_forward(
    volume: int,
    layers: Records,
    weights: Doubles,
    input: Real,
    output: Real,
    log_det: Doubles,
    n_threads: int = 0,
) -> None: ...
def flow_inverse(
    volume: int,
    layers: Records,
    weights: Doubles,
    input: Real,
    output: Real,
    log_det: Doubles,
    n_threads: int = 0,
) -> None: ...
def flow_vjp(
    volume: int,
    layers: Records,
    weights: Doubles,
    z: Real,
    dx: Real,
    dlog_det: Doubles,
    dz: Real,
    dweights: Doubles | None,
    n_threads: int = 0,
) -> None: ...
def flow_inverse_vjp(
    volume: int,
    layers: Records,
    weights: Doubles,
    z: Real,
    dx: Real,
    dlog_det: Doubles,
    dz: Real,
    dweights: Doubles | None,
    n_threads: int = 0,
) -> None: ...
def flow_loss(
    volume: int,
    layers: Records,
    weights: Doubles,
    theory: Records,
    z: Real,
    action: Doubles,
    log_det: Doubles,
    dweights: Doubles,
    n_threads: int = 0,
) -> None: ...
def pullback_force(
    volume: int,
    layers: Records,
    weights: Doubles,
    theory: Records,
    z: Real,
    action: Doubles,
    force: Real,
    n_threads: int = 0,
) -> None: ...
def layer_n_weights(layers: Records) -> NDArray[np.int64]: ...
def flow_check(volume: int, layers: Records, weights: Doubles) -> None: ...
def evolve(
    layers: Records | None,
    weights: Doubles,
    theory: Records,
    hmc: Records,
    z: Real,
    momenta: Real,
    n_threads: int = 0,
) -> None: ...
def hmc(
    layers: Records | None,
    weights: Doubles,
    theory: Records,
    hmc: Records,
    z: Real,
    phi: Real,
    dh: Doubles,
    accepted: NDArray[np.uint8],
    smear: Doubles,
    observables: Doubles,
    n_threads: int = 0,
) -> None: ...
def fourier_evolve(
    theory: Records, hmc: Records, mass: float, phi: Real, momenta: Real, n_threads: int = 0
) -> None: ...
def fourier_hmc(
    theory: Records,
    hmc: Records,
    mass: float,
    phi: Real,
    dh: Doubles,
    accepted: NDArray[np.uint8],
    smear: Doubles,
    observables: Doubles,
    n_threads: int = 0,
) -> None: ...
def cluster_update(
    theory: Records,
    cluster: Records,
    seed: int,
    first_chain: int,
    trajectory: int,
    phi: Real,
    flipped: NDArray[np.int64],
    n_threads: int = 0,
) -> None: ...
def cluster_hmc(
    theory: Records,
    hmc: Records,
    cluster: Records,
    phi: Real,
    dh: Doubles,
    accepted: NDArray[np.uint8],
    flipped: NDArray[np.int64],
    smear: Doubles,
    observables: Doubles,
    n_threads: int = 0,
) -> None: ...
def heat_bath(
    theory: Records,
    heat_bath: Records,
    cluster: Records | None,
    phi: Real,
    changed: NDArray[np.int64],
    flipped: NDArray[np.int64],
    smear: Doubles,
    observables: Doubles,
    n_threads: int = 0,
) -> None: ...
def custom_force(
    layers: Records | None,
    weights: Doubles,
    record: NDArray[np.uint8],
    z: Real,
    action: Doubles,
    force: Real,
    n_threads: int = 0,
) -> None: ...
def custom_evolve(
    layers: Records | None,
    weights: Doubles,
    record: NDArray[np.uint8],
    hmc: Records,
    z: Real,
    momenta: Real,
    n_threads: int = 0,
) -> None: ...
def custom_hmc(
    layers: Records | None,
    weights: Doubles,
    record: NDArray[np.uint8],
    hmc: Records,
    z: Real,
    phi: Real,
    dh: Doubles,
    accepted: NDArray[np.uint8],
    smear: Doubles,
    observables: Doubles,
    n_threads: int = 0,
) -> None: ...
def custom_loss(
    layers: Records,
    weights: Doubles,
    record: NDArray[np.uint8],
    z: Real,
    action: Doubles,
    log_det: Doubles,
    dweights: Doubles,
    n_threads: int = 0,
) -> None: ...
