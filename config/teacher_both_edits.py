# Laid over a config of an edit teacher: one teacher of local and global edits.
#     python train_teacher.py config/teacher_sd35_edit_sft.py config/teacher_both_edits.py
_kinds = 'local_edit', 'global_edit'
data = [_p.replace('local_edit', _k) for _p in data for _k in _kinds]
eval_data = [_p.replace('local_edit', _k) for _p in eval_data for _k in _kinds]
out_dir = out_dir.replace('local_edit', 'both_edits')
