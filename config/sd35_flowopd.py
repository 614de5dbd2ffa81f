# Flow-OPD (2605.08063) with Flow-GRPO's published teachers: a policy gradient of the KL to the routed
# teacher, held near the base (MAR), from merged teachers. reward = 'k1' is correct, 'code' as released.
# Memory: about 24 GB (estimated: base 5 GB, adapters 1 GB, activations of 16 samples with guidance).
model = 'stabilityai/stable-diffusion-3.5-medium'
family = 'StableDiffusion3Pipeline'
resolution = 512
teachers = [dict(name='ocr', lora='jieliu/SD3.5M-FlowGRPO-Text', guidance=4.5),
            dict(name='geneval', lora='jieliu/SD3.5M-FlowGRPO-GenEval', guidance=4.5)]
routes = [dict(teacher='ocr', data='ocr', weight=1.0), dict(teacher='geneval', data='geneval', weight=3.0)]
routes_per_step = 1
data = ['data/examples/ocr.txt', 'data/examples/geneval.txt']
eval_data = []                                    # examples to try it; a run wants thousands, some held out

init_from = 'merge'                               # published: .92 GenEval, the best of its starts
rank = 32                                         # Flow-GRPO's
alpha = 64.0
steps = 10                                        # from here to clip_range as published
sde, eta = 'flow', 0.7
rollout_guidance = student_guidance = 4.5
method = 'flowopd'
reward = 'k1'
group_size = 16
updates = 2
clip_range = 1e-4
anchor = 'base'
anchor_beta = 0.04
batch_size = 256                                  # 16 prompts: a multiple of group_size x updates x GPUs
micro_batch = 16
betas = [0.9, 0.999]                              # torch's own; of betas and warm-up papers say nothing
lr = 3e-4                                         # Flow-GRPO's
lr_schedule = 'constant'
ema_decay = 0.9                                   # ours, as grad_checkpointing and what follows
grad_checkpointing = True
max_steps = 1000
eval_every, save_every = 100, 10                  # steps are long
sample_steps = 40                                 # Flow-GRPO's, for evaluation
score = ''
out_dir = 'out/sd35_flowopd'
