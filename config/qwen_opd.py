# Qwen-Image: guidance as a teacher, DanceOPD's operator field. The base with guidance 4.0, rescaled
# as its pipeline does it, is distilled into a student without any: half the forwards a picture. A
# LoRA of this model is one more teacher and one more route. Nobody has published it on this model.
# Memory: about 48 GB at 1024 pixels, 18 GB while words are encoded (computed, not measured: base in
# bf16 41 GB or Qwen2.5-VL 16.6 GB, adapter of rank 64 with its optimizer 2.6 GB, the rest
# activations and VAE).
model = 'Qwen/Qwen-Image'                         # Apache 2.0
family = 'QwenImagePipeline'
resolution = 1024
teachers = [dict(name='base', guidance=4.0)]      # the pipeline's own true_cfg_scale
routes = [dict(teacher='base', data='t2i')]
data = ['data/examples/t2i.txt']                  # 30 prompts, to try it; a run wants thousands
eval_data = []                                    # [] evaluates on the training rows

init_from = 'base'
rank = 64                                         # ours
alpha = 64.0
rollout_guidance = student_guidance = 1.0
steps, drop_last = 16, 0                          # from here to max_steps DanceOPD's
method = 'danceopd'
query = 'low_noise'
betas = [0.9, 0.999]                              # torch's own; of betas papers say nothing
lr = 2e-4
lr_schedule = 'constant'
max_steps = 3000
batch_size = 32                                   # 4 accumulated on 8 GPUs
micro_batch = 1
grad_checkpointing = True
ema_decay = 0.99                                  # ours, as what follows
eval_every, save_every = 300, 50
eval_samples, score = 8, ''
sample_steps = 28
out_dir = 'out/qwen_opd'
