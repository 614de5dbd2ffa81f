# DiffusionOPD (2605.15055): its three published teachers, trained by reward, into one student; all
# states of a rollout but the last are learned from. Base and teachers are public: it runs as it is.
# Memory, computed, not measured: 20 GB (base in bf16 5 GB, adapters of rank 32 and the optimizer 1
# GB, the rest activations; before training the text encoders, 11 GB, are there, and the base is
# not).
model = 'stabilityai/stable-diffusion-3.5-medium'  # gated: accept its licence, then hf auth login
family = 'StableDiffusion3Pipeline'
resolution = 512                            # from here to ema_every as published, but for
max_sequence_length = 128                   # what is said to be ours
teachers = [
    dict(name='pickscore', lora='quanhaol/DiffusionOPD/AesTeacher/lora', guidance=4.5),
    dict(name='ocr', lora='quanhaol/DiffusionOPD/OCRTeacher/lora', guidance=4.5),
    dict(name='geneval', lora='quanhaol/DiffusionOPD/GenEvalTeacher/lora', guidance=1.0)]
routes = [dict(teacher='pickscore', data='aesthetic', samples=24),
          dict(teacher='ocr', data='ocr', samples=24),
          dict(teacher='geneval', data='geneval', samples=24)]
routes_per_step = 'all'                     # one update from all tasks
data = ['data/examples/aesthetic.txt', 'data/examples/ocr.txt', 'data/examples/geneval.txt']
eval_data = []                              # ours: 24 prompts each, to try it; thousands are wanted

init_from = 'merge'                         # ours; the code's is 'base', from which the
                                            # shapes learned far less
rank, alpha = 32, 64.0
steps, drop_last = 10, 1                    # 9 of the 10 are trained, as by the release
eta = 0.0                                   # the ODE: published as faster
rollout_guidance = student_guidance = 4.5
method = 'diffusionopd'
batch_size = 72
betas = [0.9, 0.999]                        # the release's
lr = 3e-4
weight_decay = 1e-4
ema_decay, ema_every = 0.9, 8
lr_schedule = 'constant'                    # ours, as all below and the warm-up
micro_batch = 9
grad_checkpointing = True
max_steps = 1000
eval_every = 100
sample_steps = 40                           # published, for evaluation
score = ''
out_dir = 'out/sd35_opd'
