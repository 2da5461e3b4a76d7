"""Hand weights up a ladder of lattices on a line of constant physics: 8 -> 16 -> 32."""

import lfq

theories = [lfq.Phi4((L, L), beta=beta, lam=0.5) for L, beta in [(8, 0.576), (16, 0.634), (32, 0.6614)]]
flow = lfq.AffineFlow(kernel_size=3, n_blocks=1)
fits = lfq.train_ladder(flow, theories, prior="upsample", n_steps=300, batch_size=128, seed=5, progress=True)
for fit in fits:
    print(f"L = {fit.target.shape[0]}: std(log w) = {fit.std_log_w:.2f} after {fit.seconds:.1f} s")
    fit.flow.save(f"ladder-{fit.target.shape[0]}.safetensors")
