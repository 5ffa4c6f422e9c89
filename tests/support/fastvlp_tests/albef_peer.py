"""ALBEF put together from timm's DeiT and transformers' BERT, in the authors' names and losses."""

import copy

import timm
import torch
import torch.nn.functional as F
from torch import nn
from transformers import BertConfig, BertForMaskedLM
from transformers.models.bert.modeling_bert import BertLayer

from fastvlp.models.albef.config import AlbefConfig

QUEUE = 32
CONFIG = AlbefConfig(
    image_size=64, vision_width=192, vision_layers=2, vision_heads=3, text_width=192, text_heads=3,
    text_layers=2, fusion_layers=2, vocab_size=300, text_positions=40, embed_dim=32,
    queue_size=QUEUE, dropout=0.0, attention_dropout=0.0,
)  # fmt: skip


def deit(image_size=64, **kwargs):
    return timm.create_model("deit_tiny_patch16_224", img_size=image_size, depth=2, **kwargs)


def bert_config(layers=2, **kwargs):
    return BertConfig(
        vocab_size=300, hidden_size=192, num_hidden_layers=layers, num_attention_heads=3,
        intermediate_size=768, max_position_embeddings=40, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, **kwargs,
    )  # fmt: skip


def perturb(module, seed):
    """No parameter keeps a value that hides a mistake, such as a bias of zero."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.03 * torch.randn_like(parameter))
    return module.eval()


class Peer(nn.Module):
    """The four modules of one side; fusion layers come last among BERT's."""

    def __init__(self):
        super().__init__()
        self.visual_encoder = deit(num_classes=0)
        self.text_encoder = BertForMaskedLM(bert_config())
        fusion = bert_config(is_decoder=True, add_cross_attention=True, attn_implementation="sdpa")
        self.text_encoder.bert.encoder.layer.extend(BertLayer(fusion, layer_idx=i) for i in (2, 3))
        self.vision_proj, self.text_proj = nn.Linear(192, 32), nn.Linear(192, 32)

    def text(self, ids, mask):
        bert = self.text_encoder.bert
        x = bert.embeddings(input_ids=ids)
        for layer in bert.encoder.layer[:2]:
            x = layer(x, mask[:, None, None])
        return x

    def fuse(self, x, mask, images):
        for layer in self.text_encoder.bert.encoder.layer[2:]:
            x = layer(x, mask[:, None, None], encoder_hidden_states=images)
        return x

    def features(self, images, ids, mask):
        """Image tokens, text tokens, and the unit rows of both."""
        tokens, texts = self.visual_encoder.forward_features(images), self.text(ids, mask)
        image = F.normalize(self.vision_proj(tokens[:, 0]), dim=-1)
        return tokens, texts, image, F.normalize(self.text_proj(texts[:, 0]), dim=-1)


class PeerAlbef(nn.Module):
    """Student, teacher, head, temperature and queues [embed_dim, size]."""

    def __init__(self):
        super().__init__()
        self.student = perturb(Peer(), 0)
        self.teacher = perturb(copy.deepcopy(self.student), 1)
        self.itm_head, self.temp = nn.Linear(192, 2), nn.Parameter(torch.tensor(0.07))
        torch.manual_seed(2)
        self.image_queue, self.text_queue = (
            F.normalize(torch.randn(32, QUEUE), dim=0) for _ in range(2)
        )

    def checkpoint(self):
        """The state dict that the authors' training saves."""
        state = {f"itm_head.{k}": v for k, v in self.itm_head.state_dict().items()}
        state |= {"temp": self.temp.detach(), "image_queue": self.image_queue}
        state |= {"text_queue": self.text_queue, "queue_ptr": torch.tensor([8])}
        for name, side in (("", self.student), ("_m", self.teacher)):
            for key, value in side.state_dict().items():
                tower, rest = key.split(".", 1)
                state[f"{tower}{name}.{rest}"] = value
        return state

    def losses(self, images, ids, mask, masked, labels, alpha, negatives):
        """ITC, ITM and MLM with these negatives (texts of the images, images of the texts)."""
        tokens, texts, image, text = self.student.features(images, ids, mask)
        with torch.no_grad():
            tokens_m, _, image_m, text_m = self.teacher.features(images, ids, mask)
            words = self.teacher.fuse(self.teacher.text(masked, mask), mask, tokens_m)
            words = self.teacher.text_encoder.cls(words).softmax(-1)
        itc = (
            self.contrast(image, image_m, text_m, self.text_queue, alpha)
            + self.contrast(text, text_m, image_m, self.image_queue, alpha)
        ) / 2
        own = torch.arange(len(ids))
        text_at = torch.cat([own, own, negatives[0]])
        image_at = torch.cat([own, negatives[1], own])
        fused = self.student.fuse(texts[text_at], mask[text_at], tokens[image_at])
        itm = F.cross_entropy(
            self.itm_head(fused[:, 0]), (torch.arange(3 * len(own)) < len(own)).long()
        )
        hidden = self.student.fuse(self.student.text(masked, mask), mask, tokens)
        logits = self.student.text_encoder.cls(hidden)
        hard = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=-100)
        soft = -(words * logits.log_softmax(-1)).sum(-1)[labels != -100].mean()
        return itc, itm, (1 - alpha) * hard + alpha * soft

    def contrast(self, rows, rows_m, keys_m, queue, alpha):
        keys = torch.cat([keys_m.T, queue], 1)
        with torch.no_grad():
            targets = alpha * (rows_m @ keys / self.temp).softmax(1)
            targets[:, : len(rows)] += (1 - alpha) * torch.eye(len(rows))
        return -(targets * (rows @ keys / self.temp).log_softmax(1)).sum(1).mean()
