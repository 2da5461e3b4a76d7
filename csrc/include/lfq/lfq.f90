! lfq.f90: the theory, random numbers and HMC of lfq.h for Fortran 2003. Compile it along with your program and link with
! liblfq. Fields are column-major here: phi(extent(ndim), ..., extent(1), n_chains) is lfq's (n_chains, *extent).
module lfq
  use, intrinsic :: iso_c_binding
  implicit none

  integer, parameter :: lfq_max_dim = 4, lfq_max_stages = 8, lfq_n_observables = 6
  integer(c_int), parameter :: lfq_ok = 0
  integer(c_int32_t), parameter :: lfq_purpose_start = 2

  type, bind(c) :: lfq_phi4
    integer(c_int32_t) :: ndim
    integer(c_int32_t) :: extent(lfq_max_dim) = 1
    real(c_double) :: beta, lam
  end type

  ! Leapfrog unless changed.
  type, bind(c) :: lfq_integrator
    integer(c_int32_t) :: n_stages = 1, reserved = 0
    real(c_double) :: kick(lfq_max_stages + 1) = [0.5d0, 0.5d0, 0d0, 0d0, 0d0, 0d0, 0d0, 0d0, 0d0]
    real(c_double) :: drift(lfq_max_stages) = [1d0, 0d0, 0d0, 0d0, 0d0, 0d0, 0d0, 0d0]
  end type

  type, bind(c) :: lfq_hmc
    type(lfq_integrator) :: integrator
    real(c_double) :: step_size = 0.1d0
    integer(c_int32_t) :: n_steps = 10, thin = 1
    integer(c_int64_t) :: n_samples = 0, seed = 0, first_chain = 0, first_trajectory = 0
    integer(c_int32_t) :: n_steps_spread = 0, reserved = 0
  end type

  interface
    function lfq_normal_f64(seed, purpose, trajectory, first_chain, n_chains, n_per_chain, out, n_threads) &
        bind(c) result(status)
      import
      integer(c_int64_t), value :: seed, trajectory, first_chain, n_chains, n_per_chain
      integer(c_int32_t), value :: purpose, n_threads
      real(c_double), intent(out) :: out(*)
      integer(c_int) :: status
    end function
    function lfq_phi4_workspace_f64(theory, n_chains, n_threads) bind(c) result(bytes)
      import
      type(lfq_phi4), intent(in) :: theory
      integer(c_int64_t), value :: n_chains
      integer(c_int32_t), value :: n_threads
      integer(c_size_t) :: bytes
    end function
    function lfq_phi4_action_f64(theory, n_chains, phi, action, workspace, workspace_bytes, n_threads) &
        bind(c) result(status)
      import
      type(lfq_phi4), intent(in) :: theory
      integer(c_int64_t), value :: n_chains
      real(c_double), intent(in) :: phi(*)
      real(c_double), intent(out) :: action(*)
      character(c_char), intent(inout) :: workspace(*)
      integer(c_size_t), value :: workspace_bytes
      integer(c_int32_t), value :: n_threads
      integer(c_int) :: status
    end function
    function lfq_phi4_force_f64(theory, n_chains, phi, force, workspace, workspace_bytes, n_threads) &
        bind(c) result(status)
      import
      type(lfq_phi4), intent(in) :: theory
      integer(c_int64_t), value :: n_chains
      real(c_double), intent(in) :: phi(*)
      real(c_double), intent(out) :: force(*)
      character(c_char), intent(inout) :: workspace(*)
      integer(c_size_t), value :: workspace_bytes
      integer(c_int32_t), value :: n_threads
      integer(c_int) :: status
    end function
    function lfq_hmc_workspace_f64(flow, theory, n_chains, n_threads) bind(c) result(bytes)
      import
      type(c_ptr), value :: flow
      type(lfq_phi4), intent(in) :: theory
      integer(c_int64_t), value :: n_chains
      integer(c_int32_t), value :: n_threads
      integer(c_size_t) :: bytes
    end function
    function lfq_hmc_f64(flow, theory, hmc, n_chains, z, phi, dh, accepted, smear, observables, failure, workspace, &
        workspace_bytes, n_threads) bind(c) result(status)
      import
      type(c_ptr), value :: flow, phi, accepted, smear, observables, failure
      type(lfq_phi4), intent(in) :: theory
      type(lfq_hmc), intent(in) :: hmc
      integer(c_int64_t), value :: n_chains
      real(c_double), intent(inout) :: z(*)
      real(c_double), intent(out) :: dh(*)
      character(c_char), intent(inout) :: workspace(*)
      integer(c_size_t), value :: workspace_bytes
      integer(c_int32_t), value :: n_threads
      integer(c_int) :: status
    end function
    function lfq_last_error_c() bind(c, name="lfq_last_error") result(text)
      import
      type(c_ptr) :: text
    end function
  end interface

contains

  ! What the last call that failed complained about.
  function lfq_last_error() result(message)
    character(:), allocatable :: message
    character(c_char), pointer :: text(:)
    integer :: n
    call c_f_pointer(lfq_last_error_c(), text, [256])
    n = 0
    message = ""
    do while (text(n + 1) /= c_null_char)
      n = n + 1
      message = message // text(n)
    end do
  end function

end module
