# Flow-OPD (2605.08063) as released, with Flow-GRPO's public teachers: the KL to the routed teacher
# under a PPO ratio, held near the base (MAR), from the merged teachers. What the paper writes is
# reward = 'paper', nothing but noise; the policy gradient that is right, and needs no group, is
#     --reward=k1 --kl_var=true --adv_clip=1000 --group_size=1     (on the shapes it learned less)
# Memory, computed, not measured: 24 GB (base 5 GB, adapters 1 GB, activations of 16 samples with
# guidance). Base and teachers are public: this one runs as it is.
model = 'stabilityai/stable-diffusion-3.5-medium'  # gated: accept its licence, then hf auth login
family = 'StableDiffusion3Pipeline'
resolution = 512                            # published, down to betas, but for what is ours
max_sequence_length = 128                   # the releases'
teachers = [dict(name='ocr', lora='jieliu/SD3.5M-FlowGRPO-Text', guidance=4.5),
            dict(name='geneval', lora='jieliu/SD3.5M-FlowGRPO-GenEval', guidance=4.5)]
routes = [dict(teacher='ocr', data='ocr', weight=1.0),
          dict(teacher='geneval', data='geneval', weight=3.0)]
routes_per_step = 1                         # ours: drawn 1 : 3; there one step, then three
data = ['data/examples/ocr.txt', 'data/examples/geneval.txt']
eval_data = []                              # ours: examples to try it; thousands are wanted
init_from = 'merge'                         # ours: by routes, of B A; there A and B, each alone
rank, alpha = 32, 64.0                      # Flow-GRPO's
steps, drop_last = 10, 1                    # 9 of the 10 are trained
sde, eta = 'flow', 0.7
rollout_guidance = student_guidance = 4.5
method = 'flowopd'
reward, kl_var, adv_clip = 'code', 'code', 5.0
group_size = 16
updates = 2
clip_range = 1e-4
anchor, anchor_beta = 'base', 0.04
batch_size = 256                            # 16 prompts of 16
lr, weight_decay = 1e-4, 1e-4
ema_decay, ema_every = 0.9, 8
betas = [0.9, 0.999]                        # the release's
lr_schedule = 'constant'                    # ours, as all below and the warm-up
micro_batch, grad_checkpointing = 16, True
max_steps = 1000
eval_every, save_every = 100, 10            # steps are long
sample_steps = 40                           # published, for evaluation
score = ''
out_dir = 'out/sd35_flowopd'
