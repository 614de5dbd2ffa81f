# SDPO (2411.11727) on SD-Turbo: a reward learned without losing the few steps. Published with
# stochastic DDIM (eta 1); Flow-CPS keeps a state's scale as DDIM does. The release's `log_scale`, a
# factor on changes of the log-probability, is left out: there it is 1, but its log-probabilities
# are not those of a flow's step. Rewards that need an environment of their own can be served.
# Memory, computed, not measured: 12 GB (base in bf16 2 GB, adapter 0.2 GB, PickScore 4 GB, the
# rest activations).
model = 'stabilityai/sd-turbo'
family = 'StableDiffusionPipeline'
resolution = 512
method = 'sdpo'
data = ['data/examples/aesthetic.txt']      # 24 prompts, to try it; a run wants thousands
eval_data = []
reward = [dict(reward='pickscore', weight=1.0)]  # one of the four of the release
watch_reward = 'clip'                       # ours

rank = 32                                   # ours, down to eta
alpha = 32.0
steps = sample_steps = 4                    # as the model is used; the release trains 50
drop_last = 1                               # DDIM's last step has no noise either
sde, eta = 'cps', 0.8                       # 95 % of the noise is new
guidance = 1.0                              # published: the model takes none
group_size = 2                              # from here to adv_clip as published
same_noise = True
gamma = 0.99
buffer = 32
clip_range = 1e-4
adv_clip = 5.0
batch_size, micro_batch = 64, 16            # ours
betas = [0.9, 0.999]                        # these three are the release's, the rate that for
lr = 6e-5                                   # PickScore; 1e-4 for the aesthetic
weight_decay = 1e-4
lr_schedule = 'constant'                    # ours, as all below
max_steps = 2000
grad_checkpointing = True
eval_samples, score = 16, ''
out_dir = 'out/sdturbo_pickscore'
