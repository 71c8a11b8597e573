"""cbp_occl.py --walkthrough: Alg. 1 and Eq. (3) to (6) on two classes and six pixels, in numbers.

The functions of the method are handed in by the script, and every prototype, view, centroid and loss comes
from them. Only the cosines and a class's own term are taken here, so that a reader can check a loss by hand.
"""
import torch
import torch.nn.functional as F

ROWS = torch.tensor([[2.0, 1, 2], [1, 2, 2]])                          # a_l: (N,C) = (2,3)
LABELS = torch.tensor([[[1, 0, 1, 1, 255, 0]]])                        # y: (B,h,w) = (1,1,6)
FEATURES = torch.tensor([[1.0, 2, 0, 1, 3, 1],                         # F: a column is the f of a pixel
                         [2.0, 0, 1, 2, 3, 2],
                         [0.0, 1, 0, 1, 3, 1]])[None, :, None]         # (B,C,h,w) = (1,3,1,6)
LENGTH, TAU, LAMBDA, PHI = 2.0, 0.5, 1.0, 0.3                          # tau is 0.07 in the paper


def vector(values):
    """(n,) -> "( 1.33  0.67 -1.00)"."""
    return "(" + " ".join(f"{value:5.2f}" for value in values.tolist()) + ")"


def terms(name, positive, negative, total):
    """Lines of Eq. (4) or (5): cosines positive and negative (2,2), by view and class, and the mean (2,)."""
    print("                        p      n     -log( e^(p/tau) / (e^(p/tau) + e^(n/tau)) )")
    for x in range(2):
        for i in range(2):
            p, n = positive[x, i], negative[x, i]
            own = float(F.softplus((n - p) / TAU))
            print(f"  view {x + 1}, class {i + 1}    {p.item():6.2f} {n.item():6.2f}    {own:.3f}")
        print(f"  mean: {name}{x + 1}                        {total[x].item():.3f}")


def walk(gram_schmidt, category_basis_prototypes, split_views, view_centroids, centroid_loss, category_loss,
         occl_loss):
    """Print the steps; the arguments are the functions of cbp_occl.py with these names. -> L of Eq. (6)."""
    b = gram_schmidt(ROWS).float()                                     # (2,3)
    W = category_basis_prototypes(2, 3, LENGTH, rows=ROWS)             # (2,3)
    print(f"Prototypes (Alg. 1): N = 2 classes, C = 3 channels, length T = {LENGTH:g}")
    print(f"  line 3     b_1 = a_1                = {vector(b[0])}")
    print(f"  line 7     v = a_2.b_1 / b_1.b_1    =  {(ROWS[1] @ b[0] / (b[0] @ b[0])).item():5.2f},"
          f" with a_2 = {vector(ROWS[1])}")
    product = (b[0] @ b[1]).abs().item()
    print(f"  line 8-10  b_2 = a_2 - v b_1        = {vector(b[1])}, b_1.b_2 = {product:.2f}")
    for i, w in enumerate(W, 1):
        print(f"  line 12    w_{i} = T b_{i} / |b_{i}|       = {vector(w)}, |w_{i}| = {w.norm().item():.2f}")

    views = split_views(LABELS, 2)                                     # (1,1,6)
    print("\nTwo views of a class (Sec. 3.3): the first half of its pixels, and the rest; 255 is in neither")
    print("  pixel  " + "".join(f"{pixel + 1:6}" for pixel in range(6)))
    print("  class  " + "".join(f"{y if y == 255 else y + 1:6}" for y in LABELS.flatten().tolist()))
    print("  view   " + "".join(f"{x or '-':>6}" for x in views.flatten().tolist()))
    for c, line in enumerate(FEATURES[0, :, 0].tolist()):
        print(f"  f[{c + 1}]   " + "".join(f"{value:6g}" for value in line))

    centroids, counts = view_centroids(FEATURES, LABELS, views, 2)     # (2,2,3), (2,2)
    s = centroids.mean(0)                                              # (2,3)
    print("\nView Centroids v_lx (Eq. 3): mean f of class l in view x. Category Centroids s_l: their mean")
    for i in range(2):
        of_views = [f"v_{i + 1}{x + 1} = {vector(centroids[x, i])} of {int(counts[x, i])}" for x in range(2)]
        print(f"  {', '.join(of_views)}, s_{i + 1} = {vector(s[i])}")

    v = F.normalize(centroids, dim=2)                                  # (2,2,3)
    pair = (v[0] * v[1]).sum(1).expand(2, 2)                           # (2,2)
    to_s, to_w = v @ F.normalize(s, dim=1).T, v @ F.normalize(W, dim=1).T             # (2,2,2): view, i, j
    other = [1, 0]                                                     # j for i = 0 and 1
    print(f"\nL_v (Eq. 4), tau = {TAU:g}: p = cos(v_i1, v_i2), n = cos(v_ix, s_j) with the other class j")
    terms("L_v", pair, to_s[:, range(2), other], centroid_loss(centroids, counts, TAU))
    print("\nL_c (Eq. 5): p = cos(v_ix, w_i), n = cos(v_ix, w_j)")
    terms("L_c", to_w.diagonal(dim1=1, dim2=2), to_w[:, range(2), other],
          category_loss(centroids, counts, W, TAU))
    total = float(occl_loss(FEATURES, LABELS, W, LAMBDA, PHI, TAU))
    print(f"\nOCCL (Eq. 6), lambda = {LAMBDA:g}, phi = {PHI:g}:\n"
          f"  (lambda (L_v1 + L_v2) + phi (L_c1 + L_c2)) / 2 = {total:.3f}")
    return total
