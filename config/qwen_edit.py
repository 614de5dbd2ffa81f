# Qwen-Image-Edit: guidance as a teacher, DanceOPD's operator field. The base with guidance 4.0,
# rescaled as its pipeline does it, is distilled into a student that edits without any: half the
# forwards a picture. An edit LoRA of this model is one more teacher and one more route. Nobody has
# published it on this model. Its processor needs `pip install torchvision`.
# Memory: about 52 GB, 18 GB while words are encoded (computed, not measured: base in bf16 41 GB or
# Qwen2.5-VL 16.6 GB, adapter of rank 64 with its optimizer 2.6 GB, the rest activations of 8192
# tokens of picture and source, and VAE); base_storage = 'float8' saves 20 GB.
import os
model = 'Qwen/Qwen-Image-Edit-2509'               # Apache 2.0
family = 'QwenImageEditPlusPipeline'
resolution = 1024                                 # its pipeline edits near a megapixel
# words are not cut: as by its pipeline, max_sequence_length is not read
teachers = [dict(name='base', guidance=4.0)]      # the pipeline's own true_cfg_scale
routes = [dict(teacher='base', data=_k) for _k in ('local_edit', 'global_edit')]
routes_per_step = 1                               # published, with equal weights
_folder = 'data/omniedit' if os.path.isfile('data/omniedit/local_edit.csv') else 'data/examples'
data = [f'{_folder}/local_edit.csv', f'{_folder}/global_edit.csv']
eval_data = [_p.replace('.csv', '_val.csv') for _p in data if 'omniedit' in _p]

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
out_dir = 'out/qwen_edit'
