"""The kernels inside of the trainers that people have: open_clip, Hugging Face, Lightning.

Each trainer runs twice, with its own loss and with ours, and has one curve.
"""

import math

import pytest
import torch

STEPS, ROWS = 3, 8
# Adam's first steps are signs of gradients, so that roundings of a sum in another order grow.
CURVE = {"rel": 1e-4}


def pairs():
    g = torch.Generator().manual_seed(0)
    images = torch.randn(STEPS * ROWS, 3, 32, 32, generator=g)
    tokens = torch.randint(1, 40, (STEPS * ROWS, 8), generator=g)
    tokens[:, -1] = 49
    return images, tokens


def open_clip_model():
    import open_clip

    torch.manual_seed(0)
    vision = {"image_size": 32, "patch_size": 16, "width": 64, "layers": 1}
    text = {"context_length": 8, "vocab_size": 50, "width": 64, "heads": 2, "layers": 1}
    return open_clip.CLIP(32, vision, text, output_dict=True)


def test_open_clip_by_one_import():
    import open_clip

    import fastvlp.losses

    curves = []
    for module in (open_clip.loss, fastvlp.losses):
        model, loss_of, losses = open_clip_model(), module.ClipLoss(), []
        adam = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for images, tokens in zip(*(t.split(ROWS) for t in pairs()), strict=True):
            loss = loss_of(**model(images, tokens), output_dict=True)["contrastive_loss"]
            loss.backward()
            adam.step()
            adam.zero_grad()
            with torch.no_grad():
                model.logit_scale.clamp_(0, math.log(100))
            losses.append(loss.item())
        curves.append(losses)
    assert curves[1] == pytest.approx(curves[0], **CURVE)


def test_hugging_face_trainer(tmp_path):
    from transformers import CLIPConfig, CLIPModel, Trainer, TrainingArguments

    from fastvlp.losses import ClipLoss

    class ClipTrainer(Trainer):
        loss_of = ClipLoss()

        def compute_loss(self, model, inputs, return_outputs=False, **_):
            out = model(**inputs)
            scale = self.accelerator.unwrap_model(model).logit_scale.exp()
            loss = self.loss_of(out.image_embeds, out.text_embeds, scale)
            return (loss, out) if return_outputs else loss

    images, tokens = pairs()
    data = [{"pixel_values": i, "input_ids": t} for i, t in zip(images, tokens, strict=True)]
    tower = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }  # fmt: skip
    config = CLIPConfig(
        text_config={**tower, "vocab_size": 50, "max_position_embeddings": 8, "eos_token_id": 49},
        vision_config={**tower, "image_size": 32, "patch_size": 16}, projection_dim=16,
    )  # fmt: skip
    curves = []
    for trainer, own in ((Trainer, True), (ClipTrainer, False)):
        torch.manual_seed(0)
        arguments = TrainingArguments(
            str(tmp_path), per_device_train_batch_size=ROWS, max_steps=STEPS, logging_steps=1,
            report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True,
            max_grad_norm=1.0, learning_rate=1e-3, label_names=[],
        )  # fmt: skip
        extra = {"return_loss": True} if own else {}
        run = trainer(
            model=CLIPModel(config), args=arguments, train_dataset=data,
            data_collator=lambda rows, extra=extra: {
                **{k: torch.stack([row[k] for row in rows]) for k in rows[0]}, **extra
            },
        )  # fmt: skip
        run.train()
        curves.append([row["loss"] for row in run.state.log_history if "loss" in row])
    assert len(curves[1]) == STEPS
    # The trainer logs four digits.
    assert curves[1] == pytest.approx(curves[0], abs=2e-4)


def test_lightning(tmp_path):
    import lightning
    from torch.utils.data import DataLoader, TensorDataset

    from fastvlp.losses import ClipLoss
    from fastvlp.train.tasks.clip import plain_loss

    class Lit(lightning.LightningModule):
        def __init__(self, loss_of):
            super().__init__()
            self.model, self.loss_of, self.losses = open_clip_model(), loss_of, []

        def training_step(self, batch, _):
            loss = self.loss_of(*self.model(*batch).values())
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    curves = []
    for loss_of in (plain_loss, ClipLoss()):
        module = Lit(loss_of)
        lightning.Trainer(
            max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
        ).fit(module, DataLoader(TensorDataset(*pairs()), batch_size=ROWS))  # fmt: skip
        curves.append(module.losses)
    assert len(curves[1]) == STEPS
    assert curves[1] == pytest.approx(curves[0], **CURVE)
