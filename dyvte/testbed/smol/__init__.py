"""`llava_smol`: a LLaVA on a pretrained language model of 30 layers, asked in plain English about drawn scenes."""
